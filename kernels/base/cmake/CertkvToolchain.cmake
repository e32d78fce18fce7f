# Warnings, sanitizers, ccache and the floating-point contract, for every target of the project.
find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()

add_library(certkv_flags INTERFACE)
# No contraction outside the hot loops: a bound must mean the same in every compiler.
target_compile_options(certkv_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Wshadow;-Wno-psabi;-ffp-contract=off>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;--fmad=false;--expt-relaxed-constexpr>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror,-Wno-psabi,-ffp-contract=off>")
# A third of the size of a kernel's code, which matters where a program is carried (launcher/bundle).
target_compile_options(certkv_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:$<$<VERSION_GREATER_EQUAL:$<CUDA_COMPILER_VERSION>,12.8>:--compress-mode=size>>")
target_include_directories(certkv_flags INTERFACE ${CMAKE_SOURCE_DIR})

if(CERTKV_SANITIZER STREQUAL "address")
  target_compile_options(certkv_flags INTERFACE -O1 -fsanitize=address,undefined
    -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(certkv_flags INTERFACE -fsanitize=address,undefined)
  target_compile_definitions(certkv_flags INTERFACE CERTKV_SANITIZED=1)
elseif(CERTKV_SANITIZER STREQUAL "thread")
  target_compile_options(certkv_flags INTERFACE -O1 -fsanitize=thread -Wno-tsan)
  target_link_options(certkv_flags INTERFACE -fsanitize=thread)
  target_compile_definitions(certkv_flags INTERFACE CERTKV_SANITIZED=1)
elseif(NOT CERTKV_SANITIZER STREQUAL "")
  message(FATAL_ERROR "CERTKV_SANITIZER is '${CERTKV_SANITIZER}': use address, thread or nothing")
endif()

if(CERTKV_FAILPOINTS)
  target_compile_definitions(certkv_flags INTERFACE CERTKV_FAILPOINTS=1)
endif()

if(CERTKV_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "CERTKV_FUZZERS needs clang: configure with -DCMAKE_CXX_COMPILER=clang++ in "
      "a new build folder (the tests replay seeded inputs with any compiler)")
  endif()
  target_compile_options(certkv_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# Test programs are compiled with the same flags, but for the UBSan checks that quadruple the time of
# GoogleTest's headers: AddressSanitizer stops at a null pointer anyway. The layers keep them all.
add_library(certkv_test_flags INTERFACE)
if(CERTKV_SANITIZER STREQUAL "address")
  target_compile_options(certkv_test_flags INTERFACE -fno-sanitize=null,vptr,alignment)
endif()

# certkv_layer(name sources...): one static library per layer with an alias target.
function(certkv_layer name)
  add_library(certkv_${name} STATIC ${ARGN})
  add_library(certkv::${name} ALIAS certkv_${name})
  target_link_libraries(certkv_${name} PUBLIC certkv_flags)
endfunction()
