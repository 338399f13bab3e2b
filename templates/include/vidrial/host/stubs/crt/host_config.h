// Stands in for the header of the CUDA toolkit, which the wheels lack and g++ does not need.
#pragma once
