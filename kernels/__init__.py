"""The kernels that come with Vidrial, one folder each."""
