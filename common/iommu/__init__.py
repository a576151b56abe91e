"""Device address spaces: IOVA tree, vIOMMU, containers and how DMA into them is tracked."""
