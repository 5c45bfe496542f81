"""The words that every room shares: plain pydantic, no database, no torch.

`engine` may import this package and nothing else of the project.
"""
