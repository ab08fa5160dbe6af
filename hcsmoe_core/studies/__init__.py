"""Studies: the whole road as one function, cells measured once, grids, clusters, the paper's tables."""
