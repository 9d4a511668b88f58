// The digest of the sources of this build. A separate file, because each change compiles it again.
namespace ddpm_fast {

extern const char* const build_sources;
const char* const build_sources = DDPM_FAST_SOURCES;

}  // namespace ddpm_fast
