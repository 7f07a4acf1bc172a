"""Text to tokens on disk: corpora, tokenizers, parallel preprocessing to `.bin/.idx`. No torch."""
