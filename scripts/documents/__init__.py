"""Documents made from the code: one module for each document in docs/, of its name.

python -m scripts.documents.NAME            print it as it should be
python -m scripts.documents.NAME --write    bring it up to date
"""
