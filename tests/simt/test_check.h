// One line for each case of a test program, and its exit code.
#pragma once

#include <cstdio>
#include <string>

inline int g_num_failed = 0;

inline void check(const std::string& name, bool is_right, const std::string& found = "") {
  printf("%s  %s%s%s\n", is_right ? "ok    " : "FAILED", name.c_str(), found.empty() ? "" : ": ",
         found.c_str());
  g_num_failed += !is_right;
}

inline void skip(const std::string& name, const std::string& reason) {
  printf("skip    %s: %s\n", name.c_str(), reason.c_str());
}
