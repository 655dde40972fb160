# mirage_add_kernels(target sources...): compiles the sources once per instruction set into `target`, for avx512_bf16 and
# amx_bf16 those that gain by it, each time with MIRAGE_ISA naming the namespace their code goes to. csrc/common/cpu/isa.h
# says which one runs.

set(kernel_options -Wall -Wextra -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-rounding-math
                   -Wno-psabi -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized)

set(avx512_flags -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)

include(CheckCXXCompilerFlag)

function(mirage_add_isa target isa)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "FLAGS;SOURCES")
  set(objects ${target}_${isa})
  add_library(${objects} OBJECT ${arg_SOURCES})
  target_compile_definitions(${objects} PRIVATE MIRAGE_ISA=${isa})
  target_compile_options(${objects} PRIVATE ${kernel_options} ${arg_FLAGS})
  target_include_directories(${objects} PRIVATE $<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${objects} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  get_target_property(definitions ${target} COMPILE_DEFINITIONS)
  if(definitions)
    target_compile_definitions(${objects} PRIVATE ${definitions})
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
endfunction()

function(mirage_add_kernels target)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    target_compile_definitions(${target} PUBLIC MIRAGE_HAVE_X86_ISAS)
    mirage_add_isa(${target} avx2 FLAGS -mavx2 -mfma -mf16c SOURCES ${ARGN})
    mirage_add_isa(${target} avx512 FLAGS ${avx512_flags} SOURCES ${ARGN})
    set(bf16_sources ${ARGN})
    list(FILTER bf16_sources INCLUDE REGEX "/(channel_attention_stage|channel_layer_norm|dense_conv2d|feed_forward_stage|gated_depthwise_ffn|mixer_stage)/")
    mirage_add_isa(${target} avx512_bf16 FLAGS ${avx512_flags} -mavx512bf16 SOURCES ${bf16_sources})
    check_cxx_compiler_flag(-mamx-bf16 MIRAGE_COMPILES_AMX)
    if(MIRAGE_COMPILES_AMX)
      target_compile_definitions(${target} PUBLIC MIRAGE_HAVE_AMX)
      set(amx_sources ${ARGN})
      list(FILTER amx_sources INCLUDE REGEX "/(channel_attention_stage/cpu/forward|dense_conv2d/cpu|feed_forward_stage/cpu/forward|mixer_stage/cpu/forward)_kernels")
      mirage_add_isa(${target} amx_bf16 FLAGS ${avx512_flags} -mavx512bf16 -mamx-tile -mamx-bf16 SOURCES ${amx_sources})
    else()
      message(STATUS "AMX: left out, the compiler does not know -mamx-bf16. bfloat16 is multiplied in vectors.")
    endif()
  endif()
  mirage_add_isa(${target} baseline SOURCES ${ARGN})
endfunction()
