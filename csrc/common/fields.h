// Walks over the fields of the structs of common/args.h.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "common/args.h"

namespace ddpm_fast {

template <class T>
concept HasFields = requires { T::names(); };

// Calls visit(field) for every field in order. A struct within `args` counts as its own fields.
template <HasFields Args, class Visit>
void for_each_field(Args& args, Visit&& visit) {
  const auto one = [&](auto& field) {
    if constexpr (HasFields<std::remove_reference_t<decltype(field)>>) {
      for_each_field(field, visit);
    } else {
      visit(field);
    }
  };
  args.visit_fields(one);
}

inline std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> parts = {""};
  for (const char c : names) {
    if (c == ',') {
      parts.emplace_back();
    } else if (c != ' ') {
      parts.back() += c;
    }
  }
  return parts;
}

// The names of the fields that for_each_field visits.
template <HasFields Args>
std::vector<std::string> field_names() {
  std::vector<std::string> names;
  const std::vector<std::string> own = split(Args::names());
  std::size_t next = 0;
  const auto one = [&](auto& field) {
    using Field = std::remove_reference_t<decltype(field)>;
    const std::string& name = own[next++];
    if constexpr (std::is_same_v<Field, ChannelInput>) {
      names.insert(names.end(), {name, name + "_dtype"});
    } else if constexpr (HasFields<Field>) {
      for (const std::string& nested : field_names<Field>()) names.push_back(nested);
    } else {
      names.push_back(name);
    }
  };
  Args args{};
  args.visit_fields(one);
  return names;
}

}  // namespace ddpm_fast
