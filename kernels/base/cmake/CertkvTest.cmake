# How a test is declared. Labels carry the tiers; tests/README.md says what each means.
include(GoogleTest)
find_package(Python3 3.9 QUIET COMPONENTS Interpreter)

set(certkv_labels unit ranks mpi e2e slow long cuda gpu)

# What is built for the passes that run only a part of the tests.
add_custom_target(certkv_sanitized_tests)  # unit and ranks, without slow and long
add_custom_target(certkv_cuda_tests)       # cuda

function(certkv_expect_labels name)
  if(NOT ARGN)
    message(FATAL_ERROR "test ${name}: at least one of the LABELS ${certkv_labels} is needed")
  endif()
  foreach(label IN LISTS ARGN)
    if(NOT label IN_LIST certkv_labels)
      message(FATAL_ERROR "test ${name}: label '${label}' is not one of ${certkv_labels}")
    endif()
  endforeach()
endfunction()

# certkv_test_environment(variable labels...): what a test's process finds in its environment.
function(certkv_test_environment variable)
  set(environment "")
  set(support "${CMAKE_SOURCE_DIR}/tests/support")
  if(CERTKV_SANITIZER STREQUAL "address")
    list(APPEND environment "ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1"
      "LSAN_OPTIONS=suppressions=\"${support}/lsan.supp\":print_suppressions=0"
      "UBSAN_OPTIONS=print_stacktrace=1")
  elseif(CERTKV_SANITIZER STREQUAL "thread")
    list(APPEND environment
      "TSAN_OPTIONS=suppressions=\"${support}/tsan.supp\":second_deadlock_stack=1"
      # UCX's hook of madvise runs at the end of a thread, when ThreadSanitizer has let go of it.
      "UCX_MEM_MMAP_HOOK_MODE=none")
  endif()
  # OpenBLAS's own threads would multiply with those of ctest's jobs and of the rank threads.
  list(APPEND environment "OPENBLAS_NUM_THREADS=1" "OMP_NUM_THREADS=1")
  if("mpi" IN_LIST ARGN OR "e2e" IN_LIST ARGN)
    # Open MPI refuses to run as root unless told twice; elsewhere this changes nothing.
    list(APPEND environment "OMPI_ALLOW_RUN_AS_ROOT=1" "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
  endif()
  set(${variable} "${environment}" PARENT_SCOPE)
endfunction()

# How many of ctest's jobs a test counts for: those that start ranks take two.
function(certkv_processors variable)
  set(${variable} 1 PARENT_SCOPE)
  if("mpi" IN_LIST ARGN OR "e2e" IN_LIST ARGN)
    set(${variable} 2 PARENT_SCOPE)
  endif()
endfunction()

# certkv_test(name [TIMEOUT s] LABELS l... LIBRARIES t... SOURCES s...)
# A GoogleTest program, one ctest per case. Under a sanitizer its time-out is five times as long.
function(certkv_test name)
  cmake_parse_arguments(A "" "TIMEOUT" "LABELS;LIBRARIES;SOURCES" ${ARGN})
  certkv_expect_labels(${name} ${A_LABELS})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 120)
  endif()
  if(CERTKV_SANITIZER)
    math(EXPR A_TIMEOUT "5 * ${A_TIMEOUT}")
  endif()
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE ${A_LIBRARIES} GTest::gtest GTest::gmock GTest::gtest_main
    certkv_test_flags)
  if(("unit" IN_LIST A_LABELS OR "ranks" IN_LIST A_LABELS)
      AND NOT ("slow" IN_LIST A_LABELS OR "long" IN_LIST A_LABELS))
    add_dependencies(certkv_sanitized_tests ${name})
  endif()
  if("cuda" IN_LIST A_LABELS)
    add_dependencies(certkv_cuda_tests ${name})
  endif()

  if(CERTKV_SANITIZER)
    # Listing the cases runs the program without the tests' environment, and under ThreadSanitizer
    # OpenBLAS's own threads crash at its end; so do UCX's hooks of madvise in threads that end.
    set_target_properties(${name} PROPERTIES
      CROSSCOMPILING_EMULATOR "/usr/bin/env;OPENBLAS_NUM_THREADS=1;UCX_MEM_MMAP_HOOK_MODE=none")
  endif()
  # gtest_discover_tests flattens a property that is a list, so the properties are set by a script
  # that ctest reads after the list of cases.
  gtest_discover_tests(${name} TEST_LIST ${name}_cases DISCOVERY_TIMEOUT 60)
  certkv_test_environment(environment ${A_LABELS})
  certkv_processors(processors ${A_LABELS})
  set(script "${CMAKE_CURRENT_BINARY_DIR}/${name}_properties.cmake")
  file(GENERATE OUTPUT "${script}" CONTENT "if(${name}_cases)
  set_tests_properties(\${${name}_cases} PROPERTIES TIMEOUT ${A_TIMEOUT} PROCESSORS ${processors}
    LABELS [==[${A_LABELS}]==]
    ENVIRONMENT [==[${environment}]==])
endif()
")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${script}")
endfunction()

# certkv_check(name [TIMEOUT s] LABELS l... COMMAND script.py [argument...]): a Python program whose
# exit code is the result. It tests scripts and commands, so the sanitizer builds leave it out.
function(certkv_check name)
  cmake_parse_arguments(A "" "TIMEOUT" "LABELS;COMMAND" ${ARGN})
  certkv_expect_labels(${name} ${A_LABELS})
  if(CERTKV_SANITIZER)
    return()
  endif()
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 120)
  endif()
  certkv_test_environment(environment ${A_LABELS})
  certkv_processors(processors ${A_LABELS})
  add_test(NAME ${name} COMMAND ${Python3_EXECUTABLE} ${A_COMMAND})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${A_TIMEOUT} PROCESSORS ${processors}
    LABELS "${A_LABELS}" ENVIRONMENT "${environment}")
endfunction()
