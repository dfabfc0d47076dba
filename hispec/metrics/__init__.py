"""What is measured on given text: agreement of depths, perplexity, equal texts."""
