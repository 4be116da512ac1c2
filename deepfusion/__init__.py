"""DeepFusion: many private device models in, one global mixture of experts out."""
