// The precision classes by number. SOURCE: method section 5b.
#pragma once

namespace certkv {

// 0, 1, 2: the layouts of class_layouts() (k8v4, k8v8, k12v8), cheapest first; 3: exact, served
// from originals on rung 3.
inline constexpr int kClasses = 4, kExactClass = kClasses - 1;
const char* class_label(int number);  // "k8v4", ..., "exact". REQUIRES 0 <= number < kClasses

}  // namespace certkv
