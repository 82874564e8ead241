// The fields of the form for plans, by the names that the coordinator gives them.

export const FIELDS = {
  model: "Model",
  objective: "Goal",
  max_context: "Context in tokens",
  workers: "Macs",
  layers: "Layers for each stage",
  quantize: "Weights",
  kv_bits: "KV caches",
  route: "Route",
};

/** Name fields where the coordinator's sentence names options of the command line; others are a worker's, and stay. */
export const inFields = (text) =>
  text.replace(/--([a-z]+(?:-[a-z]+)*)/g, (option, name) => {
    const field = FIELDS[name.replaceAll("-", "_")];
    return field ? `“${field}”` : option;
  });
