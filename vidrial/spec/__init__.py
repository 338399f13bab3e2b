"""The description of a kernel and of an op.

To describe: `fields` (problems and configs), `choices` (walks over a config), `kernel`, `op`, `geometry` (a launch's shape), `cost`; `authored`
says an author's slips where they were made. To render: `source`, `headers`, `digest` (what keys are made of). To ask what is legal and how
fast: `survey` by `outcomes`, given out as a `space`, with `refusals` where nothing is legal. As text: `registry` (ops and problems), `chosen`
(choices).
"""
