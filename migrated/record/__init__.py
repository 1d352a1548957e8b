"""Records of attempts: their closed sets of words (``terms``), the parts of a downtime (``parts``), the frozen document
(``model``), and reading documents that another version wrote (``reading``)."""
