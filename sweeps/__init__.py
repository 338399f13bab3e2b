"""Rankings that come with Vidrial (`results/<device key>/<op>.json`), and the programs that measure and validate them on a GPU."""
