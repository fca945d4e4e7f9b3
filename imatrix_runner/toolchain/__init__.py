"""llama.cpp's own binaries: find them, check that they run, build them, or install a release.

``probe`` proves one directory, ``locate`` ranks the places to look, ``build`` compiles from source, ``release`` installs an
official archive; the last two fill the managed cache that ``store`` describes.
"""
