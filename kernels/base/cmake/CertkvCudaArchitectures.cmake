# Which architectures the CUDA code is compiled for. One that is given as CMAKE_CUDA_ARCHITECTURES is
# taken as it is; otherwise CERTKV_CUDA_ARCHITECTURES decides.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "${CERTKV_CUDA_ARCHITECTURES}")
  if(CERTKV_CUDA_ARCHITECTURES STREQUAL "")
    execute_process(COMMAND nvidia-smi -L OUTPUT_VARIABLE certkv_gpus ERROR_QUIET
      RESULT_VARIABLE certkv_smi_status)
    if(certkv_smi_status EQUAL 0 AND certkv_gpus MATCHES "^GPU ")
      set(CMAKE_CUDA_ARCHITECTURES native)
    else()
      set(CMAKE_CUDA_ARCHITECTURES 90)
    endif()
  elseif(CERTKV_CUDA_ARCHITECTURES STREQUAL "packages")
    # Cut to what this nvcc knows: older ones lack the newest, newer ones drop the oldest.
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE certkv_known
      COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[0-9]+" certkv_known "${certkv_known}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    set(certkv_left_out "")
    foreach(architecture 80 86 89 90 100 120)
      if(architecture IN_LIST certkv_known)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture})
      else()
        list(APPEND certkv_left_out ${architecture})
      endif()
    endforeach()
    if(certkv_left_out)
      message(STATUS "certkv: left out, because this nvcc does not know them: architectures "
        "${certkv_left_out} (100 and 120 need CUDA 12.8)")
    endif()
  endif()
endif()
