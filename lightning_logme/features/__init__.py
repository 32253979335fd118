"""Turn a module and a batch into features: one vector for each label."""
