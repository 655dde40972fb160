// What decides which instruction set active_isa() is: MIRAGE_CPU_ISA where it names one that can run, else what was
// preferred before a kernel first ran, else the built-in choice.
#pragma once

#include "isa.h"

namespace mirage::cpu {

// The set that is chosen where nobody says otherwise.
Isa built_in_isa();

// Why the kernels of the set of this name cannot run on this machine and in this build; empty where they can.
const char* isa_problem(const char* name);

// Choose the set of this name where MIRAGE_CPU_ISA is not set. Nothing changes once active_isa() was called, nor where
// isa_problem() has a reason.
void prefer_isa(const char* name);

}  // namespace mirage::cpu
