"""What was measured, to look at: the sweep's page (`rows`, in the looks of `page`), its picture (`plot`), and models' curves (`models`)."""
