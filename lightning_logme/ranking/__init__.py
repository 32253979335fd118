"""Rankings of backbones, or of checkpoints, by how well their features suit a task."""
