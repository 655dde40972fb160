// Memory that a caller has just allocated for a result and nobody has touched.
#pragma once

#include <cstddef>

namespace mirage::cpu {

// Asks for huge pages where a result has 4 MiB or more: allocators give such memory back to the system and map
// it afresh, and then it takes a fault for every 2 MiB of it instead of every 4 KiB. Does nothing where the system has
// none. Only whole huge pages inside the result are asked for, all of which are going to be written.
void expect_writes(void* data, size_t bytes) noexcept;

}  // namespace mirage::cpu
