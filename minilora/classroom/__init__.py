"""What only the lessons need: exercises that explain, figures with sliders, and the builder of the notebooks.

    exercises     check, hint, overview             bets           predict, settle
    lessons       where their sources are           evidence       verdicts, expect_bug
    explorer      show, explorer                    plots          every figure, numbers in, Figure out
    instrumented  an array that logs what is made   progress       the learner's local file
    build         lessons/ → notebooks/             claims         what articles say, and what settles it
    ledger        claims → CLAIMS.md

`lessons/README.md` says how a lesson is written with them. Imports nothing.
"""
