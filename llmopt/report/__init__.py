"""Results: typed values (`results`), promises (`gates`), and how they look as text, Markdown and JSON (`render`)."""
