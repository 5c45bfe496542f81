"""Figures as SVG text: pure functions of numbers, for REST and pages alike.

A `Figure` goes into a page as it is (`{{ figure }}`), coloured by the page's style sheet, or
stands alone (`figure.document()`), with the colours of `figure.css`.
"""
