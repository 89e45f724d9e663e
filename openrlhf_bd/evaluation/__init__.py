"""Evaluation of students: sampling, scores, comparison tables, figures and the HTML report."""
