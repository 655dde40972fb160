// A weight that may be absent, where its absence is asked for.
#pragma once

#include "dtypes.h"
#include "mirage/stage_weights.h"

namespace mirage::cpu::MIRAGE_ISA {

// A vector in the accumulator type, or null where it is absent.
template <class A>
class VectorOrNull {
 public:
  explicit VectorOrNull(const Tensor& t) : exists_(exists(t)), values_(exists_ ? t : Tensor{nullptr, kDTypeOf<A>, 1}) {}
  MIRAGE_INLINE const A* from(int64_t first) const { return exists_ ? values_.get() + first : nullptr; }

 private:
  const bool exists_;
  const InAccumulator<A> values_;
};

}  // namespace mirage::cpu::MIRAGE_ISA
