"""What `minitp bench` measures: the limits of the machine, and how near to them the model runs."""
