"""Flash attention on Vidrial: the folder is reserved, no kernel is here yet."""
