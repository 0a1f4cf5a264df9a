"""From lessons to everything that is handed out: `python -m minilora.classroom.build`.

    lessons/03_slug/lesson.py   →   notebooks/03_slug.ipynb            executed, with its figures
                                    notebooks/student/03_slug.ipynb    not executed, with blanks to fill
                                →   build/pages/03_slug.html           the executed notebook, to read and to print
                                    build/slides/03_slug.html          its cells tagged `slide`, and their figures
                                    build/nbgrader/, build/otter/      masters for graders, with hidden answers

The source is the only place where a lesson is edited. A notebook carries the hash of the sources it was made from, so
`--check` can say, without running anything, which notebooks are not the ones their sources make. A notebook whose cells
somebody edited is never written over. `lessons/README.md` says how a source is written, `lessons/INSTRUCTORS.md` what
to do with the masters.

    lesson     a lesson's folder and what is made from it       lint       the rules of a source
    cells      from the source to cells                         quiz       quiz.yml, read and checked
    notebooks  what a notebook's file says of its source        executing  run it, look at its outputs
    pages      HTML to read and print                           slides     HTML to show
    masters    for nbgrader and otter
"""

try:
    import jupytext  # noqa: F401
    import nbclient  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError("building notebooks needs the course's packages: pip install 'minilora[course]'") from error
