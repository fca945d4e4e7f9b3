"""What tests of several rooms share: tiny real models, llama.cpp's own programs, command lines, servers, pages."""
