"""Pure tensor functions: what a Lorsa computes, without parameters, hooks or models."""
