"""Who holds which layers, and why. Pure: sizes in, layer ranges out."""
