"""A vision-language model as judge."""
