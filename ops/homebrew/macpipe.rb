# frozen_string_literal: true

# A formula for a tap of your own: README.md says how to install it. No release exists yet, so it builds from git.
class Macpipe < Formula
  desc "Serve one large language model on several Macs"
  homepage ENV.fetch("HOMEBREW_MACPIPE_REPOSITORY", "https://localhost/macpipe")
  license "Apache-2.0"
  head homepage, using: :git, branch: "main"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  def install
    system formula_opt_python, "-m", "venv", libexec
    system libexec / "bin/python", "-m", "pip", "install", "--constraint", "ops/constraints.txt", buildpath
    bin.install_symlink libexec / "bin/macpipe"
  end

  def formula_opt_python
    Formula["python@3.13"].opt_bin / "python3.13"
  end

  test do
    assert_match "macpipe", shell_output("#{bin}/macpipe --version")
  end
end
