"""A data set of videos as a data set of latents: how it is made, and how it is read."""
