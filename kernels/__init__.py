"""The kernels that come with Vidrial, one folder each; beside them what their NumPy paths share."""
