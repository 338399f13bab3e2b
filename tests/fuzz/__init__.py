"""A seeded fuzzer of every op's public call: a right result or a typed error, nothing else (`python -m tests.fuzz --help`)."""
