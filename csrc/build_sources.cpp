// The digest of the sources of this build. A file of its own, as it is compiled after each change.
namespace ddpm_fast {

extern const char* const build_sources;
const char* const build_sources = DDPM_FAST_SOURCES;

}  // namespace ddpm_fast
