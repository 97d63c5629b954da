"""What the nodes share towards the page: schemas, progress, images, inputs of several nodes."""
