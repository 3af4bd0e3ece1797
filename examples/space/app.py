"""A page that draws with a one-step student, for a Hugging Face Space or any host of Gradio apps.

STUDENT is a folder that `d2g export` wrote beside this file, or a shipped name. TEACHER may be empty.
"""

import os

from d2g.diffusion.teacher_sampler import SolverSettings
from distill.browser_page import build_page, open_page
from distill.sampling import load_student

student, teacher = os.environ.get("STUDENT", "miniature"), os.environ.get("TEACHER") or None
prompt = os.environ.get("PROMPT", "a large red metal sphere left of a small blue matte cube, pink background")
page = open_page(load_student(student), student, teacher, SolverSettings(steps=20), prompt)
demo = build_page(page)

if __name__ == "__main__":
    demo.launch()
