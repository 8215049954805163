"""The whole story on one page: train Lorsas on a model, splice them in, name their heads."""
