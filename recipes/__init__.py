"""The recipes that come with tfdist: each a plain module with `build_model`, `build_data` and `RECIPE`.

`python -m tfdist.train --list_recipes` lists them; `--recipe=NAME` runs one. Copy a file to start your own, and run
it by its path: `--recipe=./my_recipe.py`.
"""
