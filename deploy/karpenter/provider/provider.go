// Package provider is Karpenter's cloud provider for a Spindrift pool: NodeClaims of
// the cell become a driver's instances, whose agents join with a token that is made
// here. It keeps nothing: what is there is what the driver and the cell say.
package provider

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/awslabs/operatorpkg/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
	karpenter "sigs.k8s.io/karpenter/pkg/apis/v1"
	"sigs.k8s.io/karpenter/pkg/cloudprovider"
	"sigs.k8s.io/karpenter/pkg/scheduling"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
)

// The agent's own taint keeps strangers' pods off; Karpenter takes this one away once
// it has given the Node its labels and taints.
var unregistered = driver.Taint{
	Key:    karpenter.UnregisteredTaintKey,
	Effect: string(corev1.TaintEffectNoExecute),
}

const (
	// One Create tries as many offerings: each refusal costs a call.
	mostTried = 8
	// An unhealthy host is replaced after that long, where NodeRepair is on.
	unhealthy = 10 * time.Minute
)

const (
	driftedClass    cloudprovider.DriftReason = "HostClassDrifted"
	driftedOffering cloudprovider.DriftReason = "OfferingDrifted"
)

type Provider struct {
	client    client.Client
	driver    driver.Driver
	catalogue *catalogue
	tokens    *tokens
	// The cell, as its instances are labelled with.
	cell string
}

// Settings are of one cell.
type Settings struct {
	// Cell is its id.
	Cell string
	// Server and Authority are how hosts reach it: a URL, and PEM.
	Server, Authority string
	// Memory is how long what the driver was out of is not asked for again.
	Memory time.Duration
}

func New(kube client.Client, instances driver.Driver, settings Settings) *Provider {
	return &Provider{
		client:    kube,
		driver:    instances,
		catalogue: newCatalogue(instances, settings.Memory, time.Now),
		tokens:    &tokens{client: kube, server: settings.Server, authority: settings.Authority, now: time.Now},
		cell:      settings.Cell,
	}
}

func (p *Provider) Name() string { return "spindrift" }

func (p *Provider) GetSupportedNodeClasses() []status.Object {
	return []status.Object{&api.HostClass{}}
}

func (p *Provider) RepairPolicies() []cloudprovider.RepairPolicy {
	policy := func(seen corev1.ConditionStatus) cloudprovider.RepairPolicy {
		return cloudprovider.RepairPolicy{
			ConditionType: corev1.NodeReady, ConditionStatus: seen, TolerationDuration: unhealthy,
		}
	}
	return []cloudprovider.RepairPolicy{policy(corev1.ConditionFalse), policy(corev1.ConditionUnknown)}
}

// Create asks the driver for the cheapest offering that the NodeClaim allows, then for
// the next: one that the driver has not is left out for a while, also of later calls.
func (p *Provider) Create(ctx context.Context, claim *karpenter.NodeClaim) (*karpenter.NodeClaim, error) {
	class, err := p.class(ctx, claim.Spec.NodeClassRef)
	if err != nil {
		if apierrors.IsNotFound(err) {
			return nil, cloudprovider.NewInsufficientCapacityError(fmt.Errorf("its HostClass: %w", err))
		}
		return nil, err
	}
	if ready := class.StatusConditions().Get(status.ConditionReady); ready.IsFalse() {
		return nil, cloudprovider.NewNodeClassNotReadyError(errors.New(ready.Message))
	}
	shapes, err := p.catalogue.shapes(ctx, class)
	if err != nil {
		return nil, err
	}
	// An earlier call may have come so far.
	if found, err := p.driver.Get(ctx, claim.Name); err == nil && found.State != driver.Stopping {
		return p.hydrate(found, class, shapes), nil
	} else if err != nil && !errors.Is(err, driver.ErrNotFound) {
		return nil, err
	}
	choices := choose(shapes, class, claim)
	if len(choices) == 0 {
		return nil, cloudprovider.NewInsufficientCapacityError(fmt.Errorf("the driver offers nothing now that NodeClaim %s allows", claim.Name))
	}
	bootstrap, err := p.tokens.make(ctx, claim.Name)
	if err != nil {
		return nil, err
	}
	var refusals []error
	for _, choice := range choices[:min(len(choices), mostTried)] {
		made, err := p.driver.Create(ctx, driver.Order{
			Name:         claim.Name,
			Class:        classOf(class),
			Shape:        choice.shape.Name,
			Zone:         choice.offering.Zone,
			CapacityType: choice.offering.CapacityType,
			Labels:       p.labels(class, claim, choice),
			Taints:       []driver.Taint{unregistered},
			Bootstrap:    *bootstrap,
		})
		if errors.Is(err, driver.ErrNoCapacity) {
			log.FromContext(ctx).Info("the driver is out of capacity", "shape", choice.shape.Name,
				"zone", choice.offering.Zone, "capacity-type", choice.offering.CapacityType)
			p.catalogue.soldOut(class, choice)
			refusals = append(refusals, err)
			continue
		}
		if err != nil {
			// Whether the instance comes all the same is not known: its token stays.
			return nil, fmt.Errorf("asking for instance %s: %w", claim.Name, err)
		}
		return p.hydrate(made, class, shapes), nil
	}
	if err := p.tokens.remove(ctx, claim.Name); err != nil {
		return nil, err
	}
	return nil, cloudprovider.NewInsufficientCapacityError(errors.Join(refusals...))
}

// Delete begins the end of the claim's instance; NodeClaimNotFoundError: it is over.
func (p *Provider) Delete(ctx context.Context, claim *karpenter.NodeClaim) error {
	// First: no host may join that is to go.
	if err := p.tokens.remove(ctx, claim.Name); err != nil {
		return err
	}
	err := p.driver.Delete(ctx, claim.Name)
	if errors.Is(err, driver.ErrNotFound) {
		return cloudprovider.NewNodeClaimNotFoundError(err)
	}
	return err
}

// Get tells of the instance with this provider id.
func (p *Provider) Get(ctx context.Context, providerID string) (*karpenter.NodeClaim, error) {
	found, err := p.driver.Find(ctx, providerID)
	if errors.Is(err, driver.ErrNotFound) {
		return nil, cloudprovider.NewNodeClaimNotFoundError(err)
	}
	if err != nil {
		return nil, err
	}
	return p.hydrate(found, nil, nil), nil
}

// List tells of all instances of this cell.
func (p *Provider) List(ctx context.Context) ([]*karpenter.NodeClaim, error) {
	found, err := p.driver.List(ctx)
	if err != nil {
		return nil, err
	}
	claims := []*karpenter.NodeClaim{}
	for i := range found {
		if found[i].Labels[api.CellLabel] == p.cell {
			claims = append(claims, p.hydrate(&found[i], nil, nil))
		}
	}
	return claims, nil
}

// GetInstanceTypes tells of what the driver can make for the NodePool.
func (p *Provider) GetInstanceTypes(ctx context.Context, pool *karpenter.NodePool) ([]*cloudprovider.InstanceType, error) {
	class, err := p.class(ctx, pool.Spec.Template.Spec.NodeClassRef)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	shapes, err := p.catalogue.shapes(ctx, class)
	if err != nil {
		return nil, err
	}
	kinds := []*cloudprovider.InstanceType{}
	for _, shape := range shapes {
		kinds = append(kinds, instanceType(shape, class))
	}
	return kinds, nil
}

// IsDrifted: the HostClass says something else now, or no longer allows where the
// host is.
func (p *Provider) IsDrifted(ctx context.Context, claim *karpenter.NodeClaim) (cloudprovider.DriftReason, error) {
	class, err := p.class(ctx, claim.Spec.NodeClassRef)
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if told := claim.Annotations[api.HashAnnotation]; told != "" && told != hash(class) {
		return driftedClass, nil
	}
	if !allows(class.Spec.Shapes, claim.Labels[corev1.LabelInstanceTypeStable]) ||
		!allows(class.Spec.Zones, claim.Labels[corev1.LabelTopologyZone]) {
		return driftedOffering, nil
	}
	return "", nil
}

func (p *Provider) class(ctx context.Context, reference *karpenter.NodeClassReference) (*api.HostClass, error) {
	if reference == nil {
		return nil, errors.New("nodeClassRef is missing")
	}
	class := &api.HostClass{}
	if err := p.client.Get(ctx, types.NamespacedName{Name: reference.Name}, class); err != nil {
		return nil, err
	}
	return class, nil
}

// labels are the NodeClaim's, and what the choice settles.
func (p *Provider) labels(class *api.HostClass, claim *karpenter.NodeClaim, choice choice) map[string]string {
	labels := map[string]string{}
	for key, value := range claim.Labels {
		labels[key] = value
	}
	for key, value := range settled(choice.shape, choice.offering, class.Spec.Class) {
		labels[key] = value
	}
	labels[api.CellLabel] = p.cell
	return labels
}

// settled are the labels that follow from what a host is.
func settled(shape *driver.Shape, offering driver.Offering, class string) map[string]string {
	return map[string]string{
		corev1.LabelInstanceTypeStable: shape.Name,
		corev1.LabelArchStable:         shape.Arch,
		corev1.LabelOSStable:           string(corev1.Linux),
		corev1.LabelTopologyZone:       offering.Zone,
		karpenter.CapacityTypeLabelKey: offering.CapacityType,
		api.ClassLabel:                 class,
	}
}

// hydrate says of an instance what Karpenter wants in a NodeClaim. Of a class that is
// not known it says what the instance itself tells.
func (p *Provider) hydrate(instance *driver.Instance, class *api.HostClass, shapes []driver.Shape) *karpenter.NodeClaim {
	claim := &karpenter.NodeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Name: instance.Name,
			Labels: map[string]string{
				corev1.LabelInstanceTypeStable: instance.Shape,
				corev1.LabelTopologyZone:       instance.Zone,
				karpenter.CapacityTypeLabelKey: instance.CapacityType,
				api.ClassLabel:                 instance.Class,
			},
			Annotations:       map[string]string{},
			CreationTimestamp: metav1.NewTime(instance.CreatedAt),
		},
		Status: karpenter.NodeClaimStatus{ProviderID: instance.ProviderID},
	}
	if pool, known := instance.Labels[karpenter.NodePoolLabelKey]; known {
		claim.Labels[karpenter.NodePoolLabelKey] = pool
	}
	for i := range shapes {
		if shapes[i].Name == instance.Shape {
			claim.Labels[corev1.LabelArchStable] = shapes[i].Arch
			claim.Labels[corev1.LabelOSStable] = string(corev1.Linux)
			claim.Status.Capacity = shapes[i].Capacity
			claim.Status.Allocatable = shapes[i].Allocatable
		}
	}
	if class != nil {
		claim.Annotations[api.HashAnnotation] = hash(class)
	}
	if instance.State == driver.Stopping {
		now := metav1.Now()
		claim.DeletionTimestamp = &now
	}
	return claim
}

func fits(requests, allocatable corev1.ResourceList) bool {
	for name, wanted := range requests {
		if has := allocatable[name]; has.Cmp(wanted) < 0 {
			return false
		}
	}
	return true
}

// choose lists what the NodeClaim allows, the cheapest first.
func choose(shapes []driver.Shape, class *api.HostClass, claim *karpenter.NodeClaim) []choice {
	wanted := scheduling.NewNodeSelectorRequirementsWithMinValues(claim.Spec.Requirements...)
	choices := []choice{}
	for i := range shapes {
		shape := &shapes[i]
		if !fits(claim.Spec.Resources.Requests, shape.Allocatable) {
			continue
		}
		for _, offering := range shape.Offerings {
			has := scheduling.NewLabelRequirements(settled(shape, offering, class.Spec.Class))
			// Of the labels that a machine settles: others, as the NodePool's own, are on the
			// claim whatever machine it gets.
			if offering.Available && wanted.IsCompatible(has, scheduling.AllowUndefinedWellKnownLabels) {
				choices = append(choices, choice{shape: shape, offering: offering})
			}
		}
	}
	byPrice(choices)
	return choices
}
