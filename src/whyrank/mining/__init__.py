"""From a question-and-answer dump to queries, documents and pairs worth labelling.

`stackexchange` reads the dump, `links` judges its links, `pages` knows the text behind them, `pairs` puts
questions and pages together, `output` writes the result. Nothing here opens a network connection.
"""
