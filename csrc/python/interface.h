// What Python and the libraries have agreed on.
#pragma once

namespace mirage::python {

// Counted up with every change of what a function of the modules takes or returns, together with INTERFACE of
// mirage_kernels/_runtime/dispatch.py, which takes no library of another number: one that was built from older sources.
constexpr int kInterface = 3;

}  // namespace mirage::python
