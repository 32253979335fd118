"""From a module and a batch to features: one vector for each label."""
