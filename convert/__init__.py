"""From weights to packages: checkpoint -> weights -> network -> program -> package -> verify."""
