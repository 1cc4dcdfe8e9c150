"""Run a pretrained model under a sharing map."""
