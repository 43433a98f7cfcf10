"""The user's face of this project: arrays in, pictures out. It only calls the packages above it."""
