"""From text to tokens, from documents to devices, from tokens to batches."""
